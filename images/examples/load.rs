//! Loads the images of an archive or a layout into a store: `load STORE SOURCE`.

use std::error::Error;

use hull_images::{ImageStore, Silent};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(store), Some(source)) = (args.next(), args.next()) else {
        return Err("usage: load STORE SOURCE".into());
    };
    let store = ImageStore::open(store)?;
    for image in store.load(&source, &Silent)? {
        println!("{} {:?}", image.id, image.references);
        for directory in store.unpacked_layers(&image, &Silent)? {
            println!("{}", directory.display());
        }
    }
    Ok(())
}
