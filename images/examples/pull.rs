//! Pulls an image into a store and says where its layers are: `pull STORE REFERENCE`.

use std::error::Error;

use hull_images::{Digest, ImageStore, Progress, PullOptions, Reference, Step};

struct Lines;

impl Progress for Lines {
    fn step(&self, layer: &Digest, step: Step) {
        if !matches!(step, Step::Downloading { .. } | Step::Unpacking { .. }) {
            println!("{}: {step:?}", layer.short());
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(store), Some(name)) = (args.next(), args.next()) else {
        return Err("usage: pull STORE REFERENCE".into());
    };
    let store = ImageStore::open(store)?;
    let options = PullOptions {
        progress: &Lines,
        ..PullOptions::default()
    };
    let pulled = match store.pull(&Reference::parse(&name)?, &options) {
        Ok(pulled) => pulled,
        Err(error) => {
            let mut source: Option<&dyn Error> = Some(&error);
            while let Some(cause) = source {
                println!("error: {cause}");
                source = cause.source();
            }
            return Err("the pull failed".into());
        }
    };
    println!(
        "{} {}",
        pulled.image.id,
        if pulled.newer { "is new" } else { "was here" }
    );
    for directory in store.unpacked_layers(&pulled.image, &hull_images::Silent)? {
        println!("{}", directory.display());
    }
    Ok(())
}
