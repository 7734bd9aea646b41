//! edgemeter
fn main() {}
