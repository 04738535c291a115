"""Before training: data brought in (`convert`), looked at (`inspect`), and every bad sample of it named (`validate`)."""
