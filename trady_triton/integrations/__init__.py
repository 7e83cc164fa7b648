"""TraDy in other people's training loops. Each module needs the package that it is named after, and the core none."""
