//! Links the faces of engines statically and at a fixed address, as the command line is
//! (`cli/build.rs`): each start of a container runs them two or three times, and moved they have
//! eighty pages to correct first. The monitor, which faces the guest, is moved whole.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_FEATURE").is_ok_and(|have| have.contains("crt-static")) {
        println!("cargo::rustc-link-arg-bins=-no-pie");
        println!("cargo::rustc-link-arg-bins=-static");
    }
}
