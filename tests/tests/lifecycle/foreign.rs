//! An image that others' tools made, pushed and served: umoci, skopeo, Debian's registry.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::{Process, Running};

/// A port that nothing listens on at this moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

fn registry(directory: &Path, port: u16) -> Running {
    let config = directory.join("registry.yml");
    let data = directory.join("registry");
    let text = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n\
         http: {{addr: \"127.0.0.1:{port}\"}}\n",
        data.display()
    );
    fs::write(&config, text).unwrap();
    let words = [
        "docker-registry".into(),
        "serve".into(),
        config.into_os_string(),
    ];
    let mut running = Process::new(words).spawn();
    running.await_stderr("listening on");
    running
}

/// Runs a command whose words have no spaces in them.
fn tool(command: &str) {
    Process::new(command.split_whitespace()).output().ok();
}

/// An OCI layout by umoci; the name by which umoci and skopeo know its image.
fn layout(directory: &Path) -> String {
    let tree = directory.join("tree");
    Image::new().unpack(&tree);
    fs::write(tree.join("etc/made-by"), "umoci and skopeo\n").unwrap();
    let layer = directory.join("layer.tar");
    let layout = directory.join("layout");
    let image = format!("{}:v1", layout.display());
    tool(&format!(
        "tar -C {} -cf {} .",
        tree.display(),
        layer.display()
    ));
    tool(&format!("umoci init --layout {}", layout.display()));
    tool(&format!("umoci new --image {image}"));
    tool(&format!(
        "umoci raw add-layer --image {image} {}",
        layer.display()
    ));
    tool(&format!(
        "umoci config --image {image} --config.entrypoint cat --config.cmd /etc/made-by \
         --config.env PATH=/bin --config.user alice"
    ));
    image
}

#[test]
fn pulled_from_debians_registry_and_run() {
    let Some(hull) = Hull::new() else { return };
    let directory = hull.path().join("foreign");
    let image = layout(&directory);
    let port = free_port();
    let _registry = registry(&directory, port);
    let name = format!("127.0.0.1:{port}/team/thing:v1");
    tool(&format!(
        "skopeo --insecure-policy copy --quiet --dest-tls-verify=false oci:{image} docker://{name}"
    ));

    hull.cmd(["pull", "-q", &name]).output().ok();
    let done = hull.cmd(["run", "--rm", &name]).output();
    assert_eq!(done.all(), (0, "umoci and skopeo\n".into(), String::new()));
    let flags = ["run", "--rm", "--entrypoint", "sh", &name];
    let done = hull
        .cmd(flags.into_iter().chain(["-c", "id -u; exit 31"]))
        .output();
    assert_eq!(done.all(), (31, "1000\n".into(), String::new()));
    // The same layout without any registry.
    let layout = format!("oci:{image}");
    let done = hull.cmd(["run", "--rm", "-q", &layout]).output();
    assert_eq!(done.ok(), "umoci and skopeo\n");
}
