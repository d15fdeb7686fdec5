"""What predicts the teacher."""
