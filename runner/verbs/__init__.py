"""The verbs of the operator's command line, one module each; they import what they need when they run."""
