//! Containers that go on from a checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use hull_proto::OciJson;

use crate::container::Container;
use crate::engine::{Engine, EngineError};
use crate::plan::{self, Identity, Plan, PlanError, PlannedRoot};
use crate::rootfs::copy_whole;
use crate::template::file::{self, FileError, Header, Kind};

use super::{About, CheckpointError, GUEST, KEPT, open_guest};

/// What a container that goes on has of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FromRequest {
    /// Its name; a made-up one if there is none.
    pub name: Option<String>,
    /// Its host name; the beginning of its id if there is none.
    pub hostname: Option<String>,
    /// Labels beside those that were saved.
    pub labels: BTreeMap<String, String>,
    /// The network namespace whose interfaces its guest has from here on.
    pub network: Option<PathBuf>,
    /// Removes the container when it ends.
    pub auto_remove: bool,
}

/// Opens a checkpoint: its guest's file, which is all that a bundle's needs, and the plan of its
/// container.
pub(crate) fn open(checkpoint: &Path) -> Result<(File, Plan), CheckpointError> {
    let guest = checkpoint.join(GUEST);
    let file = open_guest(&guest).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => CheckpointError::Unknown(checkpoint.to_owned()),
        _ => CheckpointError::Disk {
            action: "open",
            path: guest,
            source: error,
        },
    })?;
    let unusable = |error: FileError| CheckpointError::Unusable {
        path: checkpoint.to_owned(),
        source: error.into(),
    };
    let (header, _): (Header<About>, _) =
        file::read_head(&file, Kind::Checkpoint).map_err(unusable)?;
    Ok((file, header.key.plan))
}

impl Engine {
    /// Makes a container of a checkpoint. It goes on when it is started first; started again, it
    /// runs its command anew.
    ///
    /// # Errors
    /// If the checkpoint isn't what was written, the name is in use, or the disk refuses; nothing
    /// is left then.
    pub fn create_from(
        &self,
        checkpoint: &Path,
        request: &FromRequest,
    ) -> Result<Container, EngineError> {
        let (file, saved) = open(checkpoint)?;
        if saved.bundle.is_some() {
            return Err(CheckpointError::Engines(checkpoint.to_owned()).into());
        }
        let had = saved.network.is_some();
        if had != request.network.is_some() {
            let path = checkpoint.to_owned();
            return Err(CheckpointError::Network { path, had }.into());
        }
        check_layers(&saved, checkpoint)?;
        let container = self.make(None, request.name.as_deref(), |identity| {
            copy_of(saved, identity, request)
        })?;
        for name in KEPT {
            let from = checkpoint.join(name);
            if !from.exists() {
                continue;
            }
            let to = container.entry().directory().join(name);
            if let Err(source) = copy_whole(&from, &to) {
                // The first error is the one to tell.
                let _ = container.remove(true);
                return Err(CheckpointError::Disk {
                    action: "copy what the checkpoint has to",
                    path: to,
                    source,
                }
                .into());
            }
        }
        Ok(container.going_on_from(file))
    }
}

fn check_layers(plan: &Plan, checkpoint: &Path) -> Result<(), CheckpointError> {
    let PlannedRoot::Layers(layers) = &plan.root else {
        return Ok(());
    };
    match layers.iter().all(|layer| layer.is_dir()) {
        true => Ok(()),
        false => Err(CheckpointError::Layer {
            path: checkpoint.to_owned(),
            image: plan
                .image
                .as_ref()
                .map(|image| image.reference.clone())
                .unwrap_or_default(),
        }),
    }
}

/// The plan of a container that is another one from here on.
fn copy_of(saved: Plan, identity: Identity, request: &FromRequest) -> Result<Plan, PlanError> {
    let (before, guest_id) = (saved.hostname.clone(), saved.guest_id().to_owned());
    let hostname = plan::hostname(request.hostname.as_deref(), &identity)?;
    plan::check_name(&identity.name)?;
    let mut spec = saved.read_spec()?;
    let mut labels = saved.labels;
    labels.extend(request.labels.clone());
    // What its command finds if it is ever run anew.
    spec.set_hostname(Some(hostname.clone()));
    if let Some(process) = spec.process_mut()
        && let Some(variables) = process.env_mut()
    {
        for variable in variables {
            if *variable == format!("HOSTNAME={before}") {
                *variable = format!("HOSTNAME={hostname}");
            }
        }
    }
    let mut vm = saved.vm;
    if let Some(scratch) = &mut vm.scratch {
        scratch.fleeting = request.auto_remove;
    }
    Ok(Plan {
        vm,
        id: identity.id,
        name: identity.name,
        created_at: identity.created_at,
        hostname,
        labels,
        spec: OciJson::write(&spec)?,
        guest_id: Some(guest_id),
        network: request.network.clone(),
        auto_remove: request.auto_remove,
        ..saved
    })
}
