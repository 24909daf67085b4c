"""methodbench plugin: quant."""
