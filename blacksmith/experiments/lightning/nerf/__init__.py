"""Radiance fields in Lightning: from posed pictures to new views, videos and meshes."""
