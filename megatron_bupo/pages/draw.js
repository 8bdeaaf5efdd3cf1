const $ = id => document.getElementById(id);
const read = id => JSON.parse($(id)?.textContent ?? "null");
const make = (tag, name, ...inside) => {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...inside.filter(x => x !== null && x !== undefined));
  return e;
};
const svg = (tag, attributes, text) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  if (text !== undefined) e.textContent = text;
  return e;
};
const show = (x, digits = 3) => x === null || x === undefined ? "–"
  : x !== 0 && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3) ? x.toExponential(1)
  : (+x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
const percent = (x, digits = 0) => x === null || x === undefined ? "–" : (100 * x).toFixed(digits) + "%";
const row = (kind, ...cells) => make("tr", "", ...cells.map(c => make(kind, "", c)));

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const all = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) all.push(+(n * step).toPrecision(12));
  return all;
}

// What stands at the pointer, in #tip
function point(event, ...what) {
  const tip = $("tip");
  tip.replaceChildren(...what);
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY + 14, innerHeight - height - 8)) + "px";
}

// Light and dark: the system's, #theme=dark in the address, or the button
{
  const root = document.documentElement;
  const asked = new URLSearchParams(location.hash.slice(1)).get("theme");
  root.dataset.theme = asked || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  $("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };
}
