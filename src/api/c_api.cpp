// The C99 ABI.
