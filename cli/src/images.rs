//! `hull pull | load | images | rmi`, and the image that a run asks for.

use std::collections::HashMap;
use std::io::{IsTerminal, Write, stderr, stdin, stdout};

use anyhow::{Context, bail};
use hull_images::{
    Digest, Hold, Image, ImageStore, Platform, PullOptions, Pulled, Reference, Removed, Silent,
};
use hull_sandbox::Engine;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::args::{ImagesArgs, LoadArgs, PruneArgs, PullArgs, PullPolicy, RmiArgs, RunArgs};
use crate::failure::report_one;
use crate::format::{self, Column, Layout, Row};
use crate::progress::progress;
use crate::system::confirmed;

/// The store that all commands of this host share.
pub(crate) fn store(engine: &Engine) -> anyhow::Result<ImageStore> {
    let directory = engine.settings().state_dir.join("images");
    Ok(ImageStore::open(directory)?)
}

/// Finds, loads or pulls what `run` is to run. It must be complete for as long as no container on
/// disk names it: the hold sees to that.
pub(crate) fn for_run(
    engine: &Engine,
    store: &ImageStore,
    args: &RunArgs,
) -> anyhow::Result<(hull_sandbox::Image, Hold)> {
    let Some(name) = args.image_and_command.first() else {
        bail!("an image is required");
    };
    let hold = store.hold()?;
    let (image, hold) = match stored(store, args, name)? {
        Some(image) => (image, hold),
        None => {
            // What fails to come must be swept, which nobody can while we hold the store.
            drop(hold);
            let id = fetched(engine, store, args, name)?.id.to_string();
            let hold = store.hold()?;
            let image = store.resolve(&id)?;
            (image.context("the image was removed meanwhile")?, hold)
        }
    };
    // A pull or a load has unpacked them already.
    let layers = store.unpacked_layers(&image, &Silent)?;
    let image = hull_sandbox::Image {
        reference: name.clone(),
        id: image.id.to_string(),
        config: image.config,
        layers,
    };
    Ok((image, hold))
}

fn one_image(store: &ImageStore, source: &str, quiet: bool) -> anyhow::Result<Image> {
    let progress = progress(quiet);
    let mut images = store.load(source, &*progress)?;
    match (images.pop(), images.is_empty()) {
        (Some(image), true) => Ok(image),
        (None, _) => bail!("{source} holds no image"),
        (Some(_), false) => bail!("{source} holds several images: say which with oci:DIR:TAG"),
    }
}

/// The image called `name`, if it is here and will do.
fn stored(store: &ImageStore, args: &RunArgs, name: &str) -> anyhow::Result<Option<Image>> {
    if name.starts_with("oci:") || args.pull == PullPolicy::Always {
        return Ok(None);
    }
    let asked = args.platform.platform.as_deref();
    let wanted = asked.map(read_platform).transpose()?;
    let found = store.resolve(name)?;
    let found = found.filter(|image| wanted.as_ref().is_none_or(|wanted| is_for(image, wanted)));
    match &found {
        None if args.pull == PullPolicy::Never => bail!("No such image: {name}"),
        Some(image) if wanted.is_none() => warn_of_platform(image)?,
        _ => {}
    }
    Ok(found)
}

/// Docker's words, and as with Docker it is run all the same.
fn warn_of_platform(image: &Image) -> std::io::Result<()> {
    let host = Platform::default();
    if is_for(image, &host) {
        return Ok(());
    }
    writeln!(
        stderr(),
        "WARNING: The requested image's platform ({}/{}) does not match the detected host \
         platform ({}/{}) and no specific platform was requested",
        image.config.os(),
        image.config.architecture(),
        host.os,
        host.architecture
    )
}

/// Loads or pulls `name`.
fn fetched(
    engine: &Engine,
    store: &ImageStore,
    args: &RunArgs,
    name: &str,
) -> anyhow::Result<Image> {
    if name.starts_with("oci:") {
        return one_image(store, name, args.quiet);
    }
    let reference = Reference::parse(name)?;
    if args.pull == PullPolicy::Missing && !args.quiet {
        writeln!(
            stderr(),
            "Unable to find image '{}' locally",
            reference.familiar()
        )?;
    }
    let platform = args.platform.platform.as_deref();
    let pulled = fetch(engine, store, &reference, platform, args.quiet)?;
    if !args.quiet {
        summarize(&pulled, &reference, &mut stderr())?;
    }
    Ok(pulled.image)
}

fn is_for(image: &Image, wanted: &Platform) -> bool {
    image.config.os().to_string() == wanted.os
        && image.config.architecture().to_string() == wanted.architecture
}

fn fetch(
    engine: &Engine,
    store: &ImageStore,
    reference: &Reference,
    platform: Option<&str>,
    quiet: bool,
) -> anyhow::Result<Pulled> {
    let progress = progress(quiet);
    let options = PullOptions {
        plain_http: engine.settings().registries.plain_http.clone(),
        platform: platform.map(read_platform).transpose()?.unwrap_or_default(),
        progress: &*progress,
        ..PullOptions::default()
    };
    Ok(store.pull(reference, &options)?)
}

/// Reads `os/arch[/variant]`, or `arch` alone for Linux.
fn read_platform(text: &str) -> anyhow::Result<Platform> {
    let parts: Vec<&str> = text.split('/').collect();
    let (os, architecture, variant) = match parts[..] {
        [architecture] if architecture != "linux" => ("linux", architecture, None),
        [os, architecture] => (os, architecture, None),
        [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
        _ => bail!("invalid platform {text:?}: expected os/arch[/variant]"),
    };
    let architecture = match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if os.is_empty() || architecture.is_empty() {
        bail!("invalid platform {text:?}: expected os/arch[/variant]");
    }
    Ok(Platform {
        os: os.to_owned(),
        architecture: architecture.to_owned(),
        variant,
    })
}

fn summarize(pulled: &Pulled, reference: &Reference, out: &mut impl Write) -> anyhow::Result<()> {
    let name = reference.familiar();
    writeln!(out, "Digest: {}", pulled.digest)?;
    match pulled.newer {
        true => writeln!(out, "Status: Downloaded newer image for {name}")?,
        false => writeln!(out, "Status: Image is up to date for {name}")?,
    }
    Ok(())
}

/// `hull pull`.
pub(crate) fn pull(engine: &Engine, args: &PullArgs) -> anyhow::Result<u8> {
    let reference = Reference::parse(&args.image)?;
    let store = store(engine)?;
    let platform = args.platform.platform.as_deref();
    let pulled = fetch(engine, &store, &reference, platform, args.quiet)?;
    if !args.quiet {
        summarize(&pulled, &reference, &mut stdout())?;
    }
    writeln!(stdout(), "{reference}")?;
    Ok(0)
}

/// `hull load`.
pub(crate) fn load(engine: &Engine, args: &LoadArgs) -> anyhow::Result<u8> {
    let store = store(engine)?;
    let progress = progress(args.quiet);
    let images = match &args.input {
        Some(path) => {
            let Some(path) = path.to_str() else {
                bail!("the path {} is not UTF-8", path.display());
            };
            store.load(path, &*progress)?
        }
        None if stdin().is_terminal() => {
            bail!("requested load from stdin, but stdin is a terminal: give -i FILE or a pipe");
        }
        None => store.load_reader(&mut stdin().lock(), "standard input", &*progress)?,
    };
    for image in images {
        match image.references.is_empty() {
            true => writeln!(stdout(), "Loaded image ID: {}", image.id)?,
            false => {
                for reference in &image.references {
                    writeln!(stdout(), "Loaded image: {}", reference.familiar())?;
                }
            }
        }
    }
    Ok(0)
}

const COLUMNS: [Column; 5] = [
    ("REPOSITORY", "Repository"),
    ("TAG", "Tag"),
    ("IMAGE ID", "ID"),
    ("CREATED", "CreatedSince"),
    ("SIZE", "Size"),
];

/// `hull images`.
pub(crate) fn list(engine: &Engine, args: &ImagesArgs) -> anyhow::Result<u8> {
    let mut columns = COLUMNS.to_vec();
    if args.digests {
        columns.insert(2, ("DIGEST", "Digest"));
    }
    let layout = match args.quiet {
        true => Layout::parse(Some("{{.ID}}"), &columns)?,
        false => Layout::parse(args.format.as_deref(), &columns)?,
    };
    let now = Timestamp::now();
    let mut rows: Vec<Row> = Vec::new();
    for image in store(engine)?.list()? {
        let named = rows_of(&image, args, now);
        rows.extend(named);
    }
    if args.quiet {
        rows.dedup_by(|one, other| one.get("ID") == other.get("ID"));
    }
    layout.write(rows, &mut stdout())?;
    Ok(0)
}

/// One row for each name of the image that is asked for.
fn rows_of(image: &Image, args: &ImagesArgs, now: Timestamp) -> Vec<Row> {
    let mut names: Vec<(String, String)> = image
        .references
        .iter()
        .map(|name| {
            (
                name.familiar_name(),
                name.tag().unwrap_or("<none>").to_owned(),
            )
        })
        .collect();
    if names.is_empty() && (args.all || args.only.is_some() || !image.repo_digests.is_empty()) {
        let repository = image.repo_digests.first().map(Reference::familiar_name);
        names.push((
            repository.unwrap_or_else(|| "<none>".into()),
            "<none>".into(),
        ));
    }
    if let Some(only) = &args.only {
        let full = |name: &str| Reference::parse(name).map(|name| name.familiar_name());
        let repository = full(only).unwrap_or_else(|_| only.clone());
        let tag = only
            .rsplit_once(':')
            .map(|(_, tag)| tag)
            .filter(|tag| !tag.contains('/'));
        names.retain(|(name, own)| *name == repository && tag.is_none_or(|tag| tag == own));
    }
    let created = image
        .config
        .created()
        .as_deref()
        .and_then(|time| time.parse::<Timestamp>().ok());
    let since = created.map(|created| format!("{} ago", format::age(now.duration_since(created))));
    let id = match args.no_trunc {
        true => image.id.to_string(),
        false => image.id.short().to_owned(),
    };
    let row = |(repository, tag): (String, String)| {
        let Value::Object(row) = json!({
            "Repository": repository,
            "Tag": tag,
            "ID": id,
            "Digest": image.digest.to_string(),
            "CreatedAt": created.map_or_else(|| "N/A".into(), |created| created.to_string()),
            "CreatedSince": since.clone().unwrap_or_else(|| "N/A".into()),
            "Size": format::size(image.size),
        }) else {
            return Row::new();
        };
        row
    };
    names.into_iter().map(row).collect()
}

/// `hull rmi`.
pub(crate) fn remove(engine: &Engine, args: &RmiArgs) -> anyhow::Result<u8> {
    let store = store(engine)?;
    let users = users(engine)?;
    let in_use = |id: &Digest| users.get(&id.to_string()).cloned();
    let mut code = 0;
    for name in &args.images {
        let removed = store.remove(name, args.force, &in_use);
        match removed.with_context(|| format!("cannot remove {name}")) {
            Ok(removed) => {
                print_removed(removed)?;
            }
            Err(error) => {
                report_one(&error);
                code = 1;
            }
        }
    }
    Ok(code)
}

fn print_removed(removed: Vec<Removed>) -> std::io::Result<()> {
    for one in removed {
        match one {
            Removed::Untagged(name) => writeln!(stdout(), "Untagged: {}", name.familiar())?,
            Removed::Deleted(id) => writeln!(stdout(), "Deleted: {id}")?,
        }
    }
    Ok(())
}

/// What a prune that was in the way of another process says.
pub(crate) const BUSY: &str =
    "images are being pulled, loaded or started right now; try again when that is done";

/// `hull image prune`.
pub(crate) fn prune(engine: &Engine, args: &PruneArgs) -> anyhow::Result<u8> {
    let warning =
        "WARNING! This will remove all images without a name, and interrupted downloads.\n";
    if !args.force && !confirmed(warning)? {
        return Ok(0);
    }
    let pruned = prune_store(engine)?;
    if pruned.busy {
        bail!(BUSY);
    }
    let freed = format::size(pruned.freed_bytes);
    writeln!(stdout(), "Total reclaimed space: {freed}")?;
    Ok(0)
}

/// What a prune of the store came to.
pub(crate) struct PrunedStore {
    pub(crate) freed_bytes: u64,
    /// Others hold the store: content stayed.
    pub(crate) busy: bool,
}

/// Removes all that no image with a name needs, and says what.
pub(crate) fn prune_store(engine: &Engine) -> anyhow::Result<PrunedStore> {
    let store = store(engine)?;
    let users = users(engine)?;
    let (removed, reclaimed) = store.prune(&|id| users.get(&id.to_string()).cloned())?;
    print_removed(removed)?;
    Ok(PrunedStore {
        freed_bytes: reclaimed.blob_bytes,
        busy: reclaimed.busy,
    })
}

/// Image ids, and the container that uses each.
fn users(engine: &Engine) -> anyhow::Result<HashMap<String, String>> {
    let containers = engine.list()?;
    let user = |container: &hull_sandbox::Container| {
        let image = container.plan().image.as_ref()?;
        Some((image.id.clone(), container.name().to_owned()))
    };
    Ok(containers.iter().filter_map(user).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_as_docker_reads_them() {
        let platform = |text| {
            read_platform(text)
                .map(|p| (p.os, p.architecture, p.variant))
                .ok()
        };
        let some = |os: &str, arch: &str, variant: Option<&str>| {
            Some((os.to_owned(), arch.to_owned(), variant.map(str::to_owned)))
        };
        assert_eq!(platform("linux/amd64"), some("linux", "amd64", None));
        assert_eq!(platform("x86_64"), some("linux", "amd64", None));
        assert_eq!(
            platform("linux/arm64/v8"),
            some("linux", "arm64", Some("v8"))
        );
        for text in ["", "/", "linux/", "linux", "a/b/c/d"] {
            assert_eq!(platform(text), None, "{text}");
        }
    }
}
