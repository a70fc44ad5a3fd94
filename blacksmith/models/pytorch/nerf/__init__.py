"""Neural radiance fields in pure PyTorch: fields, occupancy, and one renderer for all of them."""
