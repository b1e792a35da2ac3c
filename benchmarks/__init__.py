"""Speed compared with peers and physical limits: `python -m benchmarks NAME…`.

A benchmark is one file of this package, found by itself. Its module defines

    ABOUT = "what is measured, beside what"        # a string literal: listed without an import
    def run(options: Options) -> Report: ...       # benchmarks.report has both

and its name is the file's. `run` imports heavy packages itself, so that a missing peer fails only
this benchmark. A function of that form outside the package is named by `MODULE:FUNCTION`.
"""
