//! Makes one image: the template from a tree, a clone from the template's image and a plan.
//! Must not know: where trees come from, what is cached.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::command::{self, command};
use crate::data::{self, PAGE_BYTES};
use crate::error::FleetError;
use crate::ext4::{self, BLOCK_BYTES};
use crate::plan::{DATABASE, NewFile, Plan, Vm};
use crate::rng::Rng;
use crate::script::Script;
use crate::tree::{Entry, Kind};

/// What was changed in a clone, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Packages that the template does not have.
    pub packages: Vec<String>,
    /// Their files, those included that replace one of the template's.
    pub package_files: u64,
    /// The bytes of these.
    pub package_bytes: u64,
    /// Files of the template that were upgraded.
    pub upgraded_files: u64,
    /// The bytes of these.
    pub upgraded_bytes: u64,
    /// Files of its own.
    pub data_files: u64,
    /// The bytes of these, holes left out.
    pub data_bytes: u64,
    /// Files of the template that were deleted; their blocks stay behind.
    pub deleted_files: u64,
    /// The bytes of these.
    pub deleted_bytes: u64,
    /// Bytes of temporary files that were written and deleted: stale blocks that the template does not have.
    pub stale_bytes: u64,
    /// Pages of 8 KiB rewritten in place.
    pub rewritten_pages: u64,
    /// How many of these with zeros.
    pub zeroed_pages: u64,
}

/// Makes and checks the template's image at `image`.
///
/// # Errors
/// What the programs say; a tree that does not fit included.
pub fn make_template(image: &Path, size: u64, uuid: &str, tree: &Path) -> Result<(), FleetError> {
    ext4::make(image, size, uuid, tree)?;
    ext4::check(image)
}

/// Where a clone's new bytes come from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The template's tree, for upgrades.
    pub template: &'a Path,
    /// The profile's tree.
    pub profile: &'a Path,
    /// A directory for files on their way into the image.
    pub staging: &'a Path,
}

/// Copies the template's image and lets the plan happen to the copy; checks it.
///
/// # Errors
/// What the programs say; a file system that is full included.
pub fn make_clone(
    template_image: &Path,
    image: &Path,
    vm: &Vm,
    plan: &Plan,
    template: &[Entry],
    sources: Sources<'_>,
) -> Result<Changes, FleetError> {
    let what = image.display().to_string();
    command::run(command("cp").args(["--sparse=always", "--reflink=auto"]).args([template_image, image]), &what)?;
    let staging = tempfile::tempdir_in(sources.staging).map_err(FleetError::file("create in", sources.staging))?;
    let changes = apply(image, vm, plan, template, Sources { staging: staging.path(), ..sources })?;
    rewrite(image, vm, plan)?;
    ext4::check(image)?;
    Ok(changes)
}

fn apply(image: &Path, vm: &Vm, plan: &Plan, template: &[Entry], from: Sources<'_>) -> Result<Changes, FleetError> {
    let dirs = template.iter().filter(|entry| entry.kind == Kind::Dir).map(|entry| entry.path.clone());
    let mut script = Script::new(dirs);
    let mut changes = Changes::default();
    let mut staged = 0u32;
    let mut stage = |bytes: &[u8]| {
        let path = from.staging.join(staged.to_string());
        staged += 1;
        fs::write(&path, bytes).map_err(FleetError::file("write", &path)).map(|()| path)
    };
    let mut write_new = |script: &mut Script, file: &NewFile| -> Result<u64, FleetError> {
        let bytes = file.render(vm);
        script.write(&stage(&bytes)?, &file.path);
        // What debugfs leaves out as a hole is no data.
        Ok(bytes.chunks(BLOCK_BYTES as usize).filter(|b| b.iter().any(|x| *x != 0)).map(|b| b.len() as u64).sum())
    };

    for file in &plan.temporary {
        changes.stale_bytes += write_new(&mut script, file)?;
    }
    for entry in &plan.added {
        match &entry.kind {
            Kind::Dir => script.make_dir(&entry.path),
            Kind::Link(target) => script.link(&entry.path, target),
            Kind::File(size) => {
                script.write(&from.profile.join(&entry.path), &entry.path);
                changes.package_files += 1;
                changes.package_bytes += size;
            }
        }
    }
    for entry in &plan.replaced {
        script.replace(&from.profile.join(&entry.path), &entry.path);
        changes.package_files += 1;
        changes.package_bytes += size_of(entry);
    }
    for file in &plan.data {
        changes.data_bytes += write_new(&mut script, file)?;
        changes.data_files += 1;
    }
    for entry in &plan.upgraded {
        let old = from.template.join(&entry.path);
        let bytes = fs::read(&old).map_err(FleetError::file("read", &old))?;
        let mut rng = Rng::for_purpose(vm.seed, &format!("upgrade {}", entry.path));
        let new = stage(&data::upgraded(&bytes, &mut rng))?;
        script.replace(&new, &entry.path);
        changes.upgraded_files += 1;
        changes.upgraded_bytes += size_of(entry);
    }
    for entry in &plan.deleted {
        script.remove(&entry.path);
        changes.deleted_files += 1;
        changes.deleted_bytes += size_of(entry);
    }
    for file in &plan.temporary {
        script.remove(&file.path);
    }
    ext4::run_script(image, script.text())?;
    changes.rewritten_pages = plan.rewrites.len() as u64;
    changes.zeroed_pages = plan.rewrites.iter().filter(|rewrite| rewrite.zeroed).count() as u64;
    Ok(changes)
}

fn size_of(entry: &Entry) -> u64 {
    if let Kind::File(size) = entry.kind { size } else { 0 }
}

/// Writes database pages where they lie, straight into the image: what a guest does to a block device. Data blocks of
/// ext4 have no checksum, so the file system stays clean.
fn rewrite(image: &Path, vm: &Vm, plan: &Plan) -> Result<(), FleetError> {
    if plan.rewrites.is_empty() {
        return Ok(());
    }
    let per_page = PAGE_BYTES as u64 / BLOCK_BYTES;
    let logical: Vec<u64> =
        plan.rewrites.iter().flat_map(|rewrite| (0..per_page).map(|i| rewrite.page * per_page + i)).collect();
    let physical = ext4::blocks_of(image, DATABASE, &logical)?;
    let file = File::options().write(true).open(image).map_err(FleetError::file("open", image))?;
    let mut rng = Rng::for_purpose(vm.seed, "rewritten pages");
    for (rewrite, blocks) in plan.rewrites.iter().zip(physical.chunks(per_page as usize)) {
        let page = match rewrite.zeroed {
            true => vec![0; PAGE_BYTES],
            false => data::page(&vm.name, rewrite.page, 1, &mut rng),
        };
        for (bytes, block) in page.chunks(BLOCK_BYTES as usize).zip(blocks) {
            file.write_all_at(bytes, block * BLOCK_BYTES).map_err(FleetError::file("write", image))?;
        }
    }
    Ok(())
}
