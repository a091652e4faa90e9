//! Streams: in the foreground, of a terminal, to a file, to a program that logs.

use std::fs;

use hull_tests::hull::Hull;
use hull_tests::process::install;

use crate::daemon::{Daemon, exit_of};

#[test]
fn streams_go_where_containerd_says() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    foreground(&daemon);
    terminal(&daemon);
    logs(&daemon, &hull);
    daemon.check();
}

fn foreground(daemon: &Daemon<'_>) {
    let script = "cat; echo err >&2; head -c 300000 /dev/zero; uname -r >&2; exit 7";
    let ran = daemon
        .run("fore", &["--rm"], &["sh", "-c", script])
        .stdin("in\n")
        .output();
    assert_eq!(ran.code, 7, "{:?}", ran.errors());
    assert_eq!(ran.stdout.len(), "in\n".len() + 300_000);
    assert!(ran.stdout.starts_with(b"in\n"));
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy();
    let errors = ran.errors();
    assert!(
        errors.starts_with("err\n") && !errors.contains(&*host),
        "{errors}"
    );
}

fn terminal(daemon: &Daemon<'_>) {
    // The size comes when the process runs already.
    let sized = "until stty size 2>&1 | grep '30 100'; do sleep 0.1; done";
    let script = format!("{sized}; read line; echo got $line; exit 4");
    let script = script.as_str();
    let [own, runc] = ["tty", "tty-runc"].map(|id| {
        let mut running = daemon
            .run(id, &["--rm", "-t"], &["sh", "-c", script])
            .tty(30, 100)
            .spawn();
        // The whole line, or the echo of what is typed comes into it.
        running.await_stdout("30 100\r\r\n");
        running.write("typed\n");
        running.await_stdout("got typed");
        running.wait().all()
    });
    assert_eq!(own, runc);
    assert_eq!(own.0, 4);
}

fn logs(daemon: &Daemon<'_>, hull: &Hull) {
    let file = hull.path().join("out/log");
    let address = format!("file://{}", file.display());
    let script = "echo out; echo err >&2";
    let ran = daemon.run(
        "file",
        &["-d", "--log-uri", &address],
        &["sh", "-c", script],
    );
    let mut events = daemon.events();
    ran.output().ok();
    events.await_stdout(&exit_of("file"));
    let mut lines: Vec<String> = fs::read_to_string(&file)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
    daemon.remove("file");
    let log = hull.path().join("logged");
    let logger = hull.path().join("logger");
    let text = format!(
        "#!/bin/sh\nexec 5>&-\n(echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2; cat <&3) > {}\n",
        log.display()
    );
    install(&logger, text);
    let address = format!("binary://{}?key=value", logger.display());
    let ran = daemon.run(
        "binary",
        &["-d", "--log-uri", &address],
        &["sh", "-c", script],
    );
    ran.output().ok();
    events.await_stdout(&exit_of("binary"));
    // Gone when this is done, and with it what it wrote late.
    daemon.remove("binary");
    let text = fs::read_to_string(&log).unwrap();
    assert_eq!(text, "default/binary key value\nout\n");
}
