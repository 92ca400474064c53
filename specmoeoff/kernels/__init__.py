"""The operators: an obvious NumPy reference, and fast versions per device."""
