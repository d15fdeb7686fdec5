"""From the students' errors to anomaly maps, scores, p-values and decisions."""
