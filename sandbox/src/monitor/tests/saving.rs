//! Checkpoints that aren't made.

use super::*;

/// Asks for a checkpoint, and has the agent asked to have its processes stand still.
fn saving(bench: &mut Bench) -> UnixStream {
    let ground = serde_json::json!({"epoch": 1, "host": "a kernel", "processor": 7});
    let line = control::request_line(Request::Checkpoint { ground }).unwrap();
    let (socket, file) = (bench.control(), tempfile::tempfile().unwrap());
    control::send_with_fds(&socket, &line, &[file.as_fd()]).unwrap();
    let question = asked(&mut bench.questions);
    assert_eq!(question, hull_proto::Request::StandStill);
    socket
}

#[test]
fn a_container_that_is_not_saved_goes_on() {
    let image = crate::request::Image {
        reference: "image".to_owned(),
        id: String::new(),
        config: oci_spec::image::ImageConfiguration::default(),
        layers: Vec::new(),
    };
    let mut bench = bench(|request| request.root = Root::Image(image));
    let goes_on = hull_proto::Request::GoOn { identity: None };
    let refusal = |socket: &UnixStream| control::answer(socket).unwrap_err().to_string();
    // This guest's machine is none.
    let client = saving(&mut bench);
    for request in [Request::Pause, Request::Stats, Request::Exec] {
        let other = bench.control();
        control::ask(&other, request).unwrap();
        assert!(refusal(&other).contains("checkpoint"));
    }
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    let why = refusal(&client);
    assert!(why.contains("can't be saved"), "{why}");
    assert_eq!(asked(&mut bench.questions), goes_on);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    // Processes that don't stand still, and a client that leaves meanwhile.
    let client = saving(&mut bench);
    let message = "stuck".to_owned();
    answer(&mut bench.questions, &hull_proto::Reply::Error { message });
    assert!(refusal(&client).contains("stuck"));
    assert_eq!(asked(&mut bench.questions), goes_on);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    drop(saving(&mut bench));
    assert_eq!(asked(&mut bench.questions), goes_on);
    for _ in 0..2 {
        answer(&mut bench.questions, &hull_proto::Reply::Ok);
    }
    // Without a file there is nothing to save it to.
    let ground = serde_json::json!({"epoch": 1, "host": "", "processor": 7});
    let client = bench.control();
    control::ask(&client, Request::Checkpoint { ground }).unwrap();
    assert!(refusal(&client).contains("no file"));
    bench.exit(0);
    assert_eq!(asked(&mut bench.questions), hull_proto::Request::PutAway);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}
