//! Links the faces of engines at a fixed address, as the command line is (`cli/build.rs`): each
//! start of a container runs them two or three times, and moved they have eighty pages to correct
//! first. The monitor, which faces the guest, is moved whole.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-no-pie");
}
