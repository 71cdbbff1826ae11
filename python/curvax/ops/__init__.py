"""Array operations with a compiled and a plain implementation each."""
