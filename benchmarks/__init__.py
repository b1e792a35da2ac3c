"""Speed beside peers and physical limits: `python -m benchmarks NAME… [--quick] [--json FILE]`.

A benchmark is one file of this package, found by itself. Its module defines

    ABOUT = "what is measured, beside what"        # a string literal: listed without an import
    def run(options: Options) -> Report: ...       # benchmarks.report has both

and its name is the file's. `run` imports what is heavy itself, so that a peer that is not installed
fails this benchmark alone. Elsewhere a function of that form is named by `MODULE:FUNCTION`.
"""
