"""What a run tells of itself: costs and peaks for its utilisation, where figures are written, and the page made of them."""
