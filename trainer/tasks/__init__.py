"""One module a task: how a record becomes tensors, how they are collated, the loss and the metric."""
