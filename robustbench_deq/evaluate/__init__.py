"""What turns an attack's proposal into a number others can believe: the judge, the evaluation, the doctor."""
