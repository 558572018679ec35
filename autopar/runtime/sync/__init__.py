"""Runs of policies that keep replicas in step (`ir.sync`) on the processes of `torch.distributed`."""
