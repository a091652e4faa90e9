//! Links the command line at a fixed address. It starts with every container, and moved to
//! another address it has a hundred pages to correct first: a tenth of the whole start. Its
//! stack, heap and libraries still lie where chance has them; the monitor, which faces the guest,
//! is moved whole.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bin=hull=-no-pie");
}
