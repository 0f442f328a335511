"""What comes out of a batch: tables for learning platforms, and pages for the class and each student."""
