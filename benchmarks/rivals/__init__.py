"""Systems that train the same model on the same data with the same optimizer, each behind `interface.System`."""
