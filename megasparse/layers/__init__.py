"""What plugs into megatron-core's slots: norms, core attention, router, mixture of experts."""
