"""The demo in a browser: the page of `otdrg demo`, and a Space on the Hub."""
