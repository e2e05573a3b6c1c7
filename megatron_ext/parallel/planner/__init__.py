"""Which layouts fit a number of devices, how much memory and time they would take, and why others cannot be. Arithmetic only: nothing here imports torch.

what a rank holds      tensors -> buffers -> memory       activations
how long it takes      hardware (gpus.yaml) -> work -> times      fit, calibrate: its constants, from finished runs
what is asked          workload, layout_names
the answer             search: the learner        rollouts, fleet: with rollout replicas
"""
