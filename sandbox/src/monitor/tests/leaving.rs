//! The end of a container whose disk is kept.

use hull_proto::Reply as Said;
use hull_proto::Request::PutAway;

use super::*;

/// A container of an image, whose guest may take so long to answer.
fn of_image(auto_remove: bool, patience: Duration) -> Bench {
    let of_image = |request: &mut RunRequest| {
        request.root = Root::Image(crate::request::Image::default());
        request.auto_remove = auto_remove;
    };
    patient_bench(of_image, patience)
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn nobody_hears_of_the_end_before_the_disk_is_put_away() {
    let mut bench = of_image(false, LONG);
    bench.exit(3);
    assert_eq!(asked(&mut bench.questions), PutAway);
    // The agent is done with the stream, and others are served meanwhile.
    bench
        .agent
        .socket
        .shutdown(std::net::Shutdown::Both)
        .unwrap();
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    assert!(!bench.driver.is_finished());
    answer(&mut bench.questions, &Said::Ok);
    assert_eq!(bench.driver.join().unwrap().0.code, 3);
}

#[test]
fn a_guest_that_cannot_or_will_not_is_not_waited_for() {
    let failing = of_image(false, LONG);
    let silent = of_image(false, Duration::from_millis(10));
    let dying = of_image(false, LONG);
    let hung_up = of_image(false, LONG);
    let killed = of_image(false, LONG);
    let removed = of_image(true, LONG);
    for (index, mut bench) in [failing, silent, dying, hung_up, killed, removed]
        .into_iter()
        .enumerate()
    {
        bench.exit(7);
        if index < 5 {
            assert_eq!(asked(&mut bench.questions), PutAway);
        }
        let message = "cannot put the scratch disk away: EIO".to_owned();
        match index {
            0 => answer(&mut bench.questions, &Said::Error { message }),
            2 => bench.end("it panicked"),
            3 => bench.questions.shutdown(std::net::Shutdown::Both).unwrap(),
            4 => {
                let (signal, all) = (9, true);
                assert_eq!(bench.ask(Request::Signal { signal, all }), Reply::Ok);
            }
            _ => {}
        }
        let (record, _) = bench.driver.join().unwrap();
        assert_eq!((record.code, record.error), (7, None), "{index}");
    }
}
