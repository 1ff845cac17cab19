"""Search of template networks for segmentation."""
