from nemo_rl.algorithms.single_controller_utils.setup import setup_single_controller

__all__ = ["setup_single_controller"]
