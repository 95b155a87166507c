"""Every call, as a flow or a feed."""
