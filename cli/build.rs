//! Links the command line statically and at a fixed address when it is built to be installed
//! (`xtask/src/stage.rs`). It starts with every container, and moved to another address it has a
//! hundred pages to correct first: a tenth of the whole start. Its stack and heap still lie where
//! chance has them; the monitor, which faces the guest, is moved whole.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_FEATURE").is_ok_and(|have| have.contains("crt-static")) {
        println!("cargo::rustc-link-arg-bin=hull=-no-pie");
        println!("cargo::rustc-link-arg-bin=hull=-static");
    }
}
