//! Puts a fleet together: decides which images have to be made, and makes them. Must not know: where trees come from.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::command;
use crate::error::FleetError;
use crate::image::{self, Changes, Sources};
use crate::plan::{Plan, Vm};
use crate::recipe::{self, TOOL_VERSION};
use crate::report::{FleetReport, ImageReport, modified_ns};
use crate::rng::Rng;
use crate::tree::{self, Entry};

/// The template's name.
const TEMPLATE: &str = "template";

/// Most images that are made at the same time: each wants a core, and the disk.
const WORKERS_MAX: usize = 4;

/// A directory tree with files for images.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Where it is.
    pub root: PathBuf,
    /// Names its content: another content has another id.
    pub id: String,
    /// The packages in it, where it is made of packages.
    pub packages: Vec<String>,
}

/// What makes machines of one kind differ from the template.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Its name, part of the VM's.
    pub name: String,
    /// Its files.
    pub tree: Tree,
}

/// What images are filled with.
#[derive(Clone, Debug)]
pub struct Contents {
    /// `packages` or `host`.
    pub source: String,
    /// What every machine has.
    pub template: Tree,
    /// VM i has profile (i - 1) modulo their number.
    pub profiles: Vec<Profile>,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// Where the images and `fleet.json` go.
    pub out: PathBuf,
    /// For files on their way into an image.
    pub cache: PathBuf,
    /// How many clones.
    pub vms: usize,
    /// The size of every image, in bytes.
    pub size: u64,
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// How much data of its own each clone has.
    pub data_bytes: u64,
}

/// Makes the images that are missing, outdated or were written to since, and says what there is.
///
/// # Errors
/// The first that occurs; what was finished before it is kept and used by the next run.
pub fn build(
    options: &FleetOptions,
    contents: &Contents,
    say: &(dyn Fn(&str) + Sync),
) -> Result<FleetReport, FleetError> {
    command::require_file_system_tools()?;
    let staging = options.cache.join("staging");
    for dir in [&options.out, &staging] {
        fs::create_dir_all(dir).map_err(FleetError::file("create the directory", dir))?;
    }
    let out = fs::canonicalize(&options.out).map_err(FleetError::file("find", &options.out))?;
    let yard = Yard {
        options,
        contents,
        before: FleetReport::load(&out),
        done: Mutex::default(),
        saving: Mutex::default(),
        out,
        staging,
        say,
    };
    yard.build()
}

/// The state of one run.
struct Yard<'a> {
    options: &'a FleetOptions,
    contents: &'a Contents,
    before: FleetReport,
    /// Finished images and their places.
    done: Mutex<Vec<(usize, ImageReport)>>,
    /// One writer of `fleet.json` at a time: the workers share its temporary file.
    saving: Mutex<()>,
    out: PathBuf,
    staging: PathBuf,
    say: &'a (dyn Fn(&str) + Sync),
}

/// An image to be made: its name, and what it is made of.
struct Job<'a> {
    vm: Vm,
    profile: &'a Profile,
    recipe: String,
}

impl Yard<'_> {
    fn build(&self) -> Result<FleetReport, FleetError> {
        let FleetOptions { size, seed, data_bytes, .. } = *self.options;
        let (size_text, seed_text) = (size.to_string(), seed.to_string());
        let template_recipe = recipe::id([TEMPLATE, &self.contents.template.id, &size_text, &seed_text]);
        let template_image = self.image_path(TEMPLATE);
        self.make(0, TEMPLATE, None, seed, &template_recipe, |part| {
            let uuid = recipe::uuid([TEMPLATE, &self.contents.template.id, &seed_text]);
            image::make_template(part, size, &uuid, &self.contents.template.root).map(|()| None)
        })?;

        let mut jobs = Vec::new();
        for (i, profile) in (1..=self.options.vms).zip(self.contents.profiles.iter().cycle()) {
            let name = format!("vm{i:02}-{}", profile.name);
            let vm_seed = Rng::for_purpose(seed, &name).next_u64();
            let parts = ["vm", &name, &template_recipe, &profile.tree.id, &data_bytes.to_string(), &seed_text];
            jobs.push(Job { recipe: recipe::id(parts), vm: Vm { name, seed: vm_seed, data_bytes }, profile });
        }
        let is_missing = |job: &Job| self.before.reusable(&job.vm.name, &job.recipe).is_none();
        // A listing takes time, too: only when a clone has to be made.
        let template = match jobs.iter().any(is_missing) {
            true => tree::list(&self.contents.template.root)?,
            false => Vec::new(),
        };
        let todo = Mutex::new(jobs.iter().enumerate());
        let next = || todo.lock().map(|mut jobs| jobs.next()).unwrap_or(None);
        let worker = || -> Result<(), FleetError> {
            while let Some((i, job)) = next() {
                self.make_clone(i + 1, job, &template, &template_image)?;
            }
            Ok(())
        };
        let count = std::thread::available_parallelism().map_or(1, |n| n.get()).min(WORKERS_MAX);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..count).map(|_| scope.spawn(worker)).collect();
            let outcomes = workers.into_iter().map(|w| w.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
            // All are waited for, then the first error counts.
            outcomes.collect::<Vec<_>>().into_iter().collect::<Result<(), _>>()
        })?;
        let report = self.report();
        report.save(&self.out)?;
        Ok(report)
    }

    fn make_clone(&self, place: usize, job: &Job, template: &[Entry], image: &Path) -> Result<(), FleetError> {
        let Job { vm, profile, recipe } = job;
        self.make(place, &vm.name, Some(&profile.name), vm.seed, recipe, |part| {
            let plan = Plan::new(vm, template, &tree::list(&profile.tree.root)?);
            let sources =
                Sources { template: &self.contents.template.root, profile: &profile.tree.root, staging: &self.staging };
            let changes = image::make_clone(image, part, vm, &plan, template, sources)?;
            Ok(Some(Changes { packages: profile.tree.packages.clone(), ..changes }))
        })
    }

    /// Makes an image unless the one of the last run will do.
    fn make(
        &self,
        place: usize,
        name: &str,
        profile: Option<&str>,
        seed: u64,
        recipe: &str,
        how: impl FnOnce(&Path) -> Result<Option<Changes>, FleetError>,
    ) -> Result<(), FleetError> {
        if let Some(image) = self.before.reusable(name, recipe) {
            self.note(place, image.clone());
            return Ok(());
        }
        let path = self.image_path(name);
        if path.exists() && !self.before.images.iter().any(|image| image.path == path) {
            let path = path.display();
            return Err(FleetError::Usage(format!(
                "{path} is there and not in {}: move it away",
                crate::report::FILE_NAME
            )));
        }
        (self.say)(&format!("making {name}"));
        let part = path.with_extension("img.part");
        let changes = how(&part)?;
        fs::rename(&part, &path).map_err(FleetError::file("rename", &part))?;
        let meta = fs::metadata(&path).map_err(FleetError::file("look at", &path))?;
        let report = ImageReport {
            name: name.to_owned(),
            path,
            profile: profile.map(str::to_owned),
            size_bytes: meta.len(),
            allocated_bytes: meta.blocks() * 512,
            seed,
            recipe: recipe.to_owned(),
            modified_ns: modified_ns(&meta),
            changes,
        };
        self.note(place, report);
        // After every image, so that an interrupted run is not lost; images of the last run that are still to come
        // stay listed.
        let _turn = self.saving.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut so_far = self.report();
        let is_listed = |image: &ImageReport| so_far.images.iter().any(|other| other.path == image.path);
        let waiting: Vec<ImageReport> = self.before.images.iter().filter(|image| !is_listed(image)).cloned().collect();
        so_far.images.extend(waiting);
        so_far.save(&self.out)
    }

    fn image_path(&self, name: &str) -> PathBuf {
        self.out.join(format!("{name}.img"))
    }

    fn note(&self, place: usize, image: ImageReport) {
        // A poisoned lock means that another worker panicked, which ends the run anyway.
        let mut done = self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        done.push((place, image));
        done.sort_by_key(|(place, _)| *place);
    }

    fn report(&self) -> FleetReport {
        let done = self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        FleetReport {
            tool_version: TOOL_VERSION.into(),
            source: self.contents.source.clone(),
            seed: self.options.seed,
            images: done.iter().map(|(_, image)| image.clone()).collect(),
        }
    }
}
