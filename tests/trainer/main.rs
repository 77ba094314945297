//! Tests on real ms-swift. `cargo xtask test` installs the environments and runs them; a plain `cargo test` skips them.

fn main_is_elsewhere() {}
