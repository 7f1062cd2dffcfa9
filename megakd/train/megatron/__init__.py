"""Launch lines of Megatron-LM: a table of its flags with their meaning here, and the reading of a line."""
