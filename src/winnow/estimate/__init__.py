"""What a pipeline will take and make, known from shapes before anything runs."""
