"""Value networks inside other libraries; each module needs that library's extra."""
