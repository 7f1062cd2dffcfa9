"""What Megatron-LM's flags come to here: tables, and how a launch line is read with them."""
