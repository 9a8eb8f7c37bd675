"""`otdrg generate`: reports of studies that are named on the command line, listed in a file, or in a dataset."""
