"""The study of a model that was not trained here, with a smaller sibling as the donor."""
