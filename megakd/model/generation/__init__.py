"""Text that a model writes: tokens read with their keys and values kept, and the choice of the next one."""
