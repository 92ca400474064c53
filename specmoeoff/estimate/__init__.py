"""What will it take, and will it fit: prices, memory and the simulated window."""
