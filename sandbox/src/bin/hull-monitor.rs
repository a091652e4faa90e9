//! The process that holds one VM.

fn main() {}
