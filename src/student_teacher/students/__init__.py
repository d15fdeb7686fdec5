"""Students of a frozen backbone: they predict the teacher's descriptors."""
