"""Tensors inside requests: no group and no shared disk, at the price of base64."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence

from megatron_bupo.rollout.client import ServerClient
from megatron_bupo.rollout.sync.transport import Bucket, Target, Transport


def pickled(bucket: Bucket) -> bytes:
    """Named tensors as SGLang reads them out of JSON."""
    # A pickled view would bring all of its storage along.
    held = [(name, tensor.detach().cpu().clone()) for name, tensor in bucket]
    return base64.b64encode(pickle.dumps(held))


class HttpTransport(Transport):
    """`/update_weights_from_tensor` with plain pickles of CPU tensors."""

    def pass_on(self, bucket: Bucket, targets: Sequence[Target]) -> Mapping[str, str]:
        text = pickled(bucket)
        # json.dumps would look at every letter for one to escape, for each server again.
        bodies = {
            size: b'{"flush_cache": false, "serialized_named_tensors": ["%s"]}'
            % b'", "'.join([text] * size)
            for size in {target.tp_size for target in targets}
        }

        async def post(target: Target, client: ServerClient) -> None:
            await client.post(
                "/update_weights_from_tensor",
                bodies[target.tp_size],
                timeout_s=self.settings.timeout_s,
            )

        return self.on_all(targets, post)
