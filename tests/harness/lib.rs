//! Harness of the whole-cluster tests.
