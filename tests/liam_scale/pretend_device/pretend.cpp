// A pretend accelerator for tests. Its memory is the host's and its operators are those of the CPU, but it keeps devices
// apart as CUDA does, and notes what a GPU would be slow at: launches, waits for the device, copies of pageable memory.
// A copy of pinned memory on a side stream runs only when somebody waits for its event, and fresh memory is full of
// NaN, so that a result that was not waited for is seen to be wrong. Launches can be recorded and replayed, as graphs of
// CUDA are.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
using Tally = std::map<std::string, long>;

std::mutex mutex_;
Tally launches, waits, mixed, copies;
bool refuses_waits = false;

void note(Tally& tally, const std::string& what, long by = 1) {
  std::lock_guard<std::mutex> lock(mutex_);
  tally[what] += by;
}

bool is_recording = false;

void wait_for_device(const std::string& what) {
  note(waits, what);
  TORCH_CHECK(!is_recording, "pretend device: the host waits for the device in ", what, " while a step is recorded");
  TORCH_CHECK(!refuses_waits, "pretend device: the host waits for the device in ", what);
}

// Memory: poisoned when fresh; pinned memory of the host is remembered by its addresses.

std::map<const char*, size_t> pinned;

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto after = pinned.upper_bound(static_cast<const char*>(pointer));
  if (after == pinned.begin()) return false;
  auto [start, size] = *--after;
  return static_cast<const char*>(pointer) < start + size;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (memory) std::memset(memory, 0xFF, bytes);
    return {memory, memory, &release, c10::Device(kPretend, 0)};
  }
  static void release(void* memory) {
    if (memory) c10::free_cpu(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> lock(mutex_);
    pinned[static_cast<const char*>(memory)] = std::max<size_t>(bytes, 1);
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      pinned.erase(static_cast<const char*>(memory));
    }
    c10::free_cpu(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceAllocator device_memory;
PinnedAllocator pinned_memory;
REGISTER_ALLOCATOR(kPretend, &device_memory);

at::Tensor on_host(const at::Tensor& tensor);

// Streams: 0 runs at once; on the others copies of pinned memory stand in a queue until an event is waited for.

using Copies = std::deque<std::pair<at::Tensor, at::Tensor>>;
struct Queue {
  Copies copies;
  long done = 0;
  // What was copied is for the caller to let go of, without the lock: a tensor that goes may wait for Python's.
  Copies run(long until) {
    Copies ran;
    for (; done < until; done++, copies.pop_front()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      copies.front().first.copy_(copies.front().second);
      ran.push_back(std::move(copies.front()));
    }
    return ran;
  }
};
struct Event {
  long stream, ticket;
};
std::map<long, Queue> queues;
std::recursive_mutex queues_mutex;  // several threads send while one waits for what was sent
using Held = std::lock_guard<std::recursive_mutex>;
thread_local long current_stream = 0;
long last_stream = 0;

c10::Stream stream_of(long id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kPretend, 0), id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kPretend; }
  c10::Device exchangeDevice(c10::Device) const override { return {kPretend, 0}; }
  c10::Device getDevice() const override { return {kPretend, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream_of(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream_of(++last_stream); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return stream_of(std::exchange(current_stream, stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Held lock(queues_mutex);
    auto& queue = queues[stream.id()];
    delete static_cast<Event*>(*event);
    *event = new Event{stream.id(), queue.done + static_cast<long>(queue.copies.size())};
  }
  void block(void* event, const c10::Stream&) const override { run(event); }
  bool queryEvent(void* event) const override {
    Held lock(queues_mutex);
    auto* e = static_cast<Event*>(event);
    return !e || queues[e->stream].done >= e->ticket;
  }
  void synchronizeEvent(void* event) const override {
    wait_for_device("event");
    run(event);
  }
  bool queryStream(const c10::Stream& stream) const override {
    Held lock(queues_mutex);
    return queues[stream.id()].copies.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    wait_for_device("stream");
    Copies ran;
    Held lock(queues_mutex);
    auto& queue = queues[stream.id()];
    ran = queue.run(queue.done + queue.copies.size());
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  static void run(void* event) {
    Copies ran;
    Held lock(queues_mutex);
    if (auto* e = static_cast<Event*>(event)) ran = queues[e->stream].run(e->ticket);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void init() const override {}
};

// The same memory as a tensor of the other side; either owner keeps the other alive.

at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kPretend) return tensor;
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, tensor.options().device(at::kCPU));
}

at::Tensor on_device(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr data(
      owner->mutable_data(), owner, [](void* o) { delete static_cast<c10::Storage*>(o); }, c10::Device(kPretend, 0));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), &device_memory, /*resizable=*/true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
  result.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return result;
}

// A recording: launches in their order, each on the memory that it had. Recording computes nothing: what launches
// wrote meanwhile is put back, and what they made is poisoned.

struct Recording {
  struct Saved {
    at::Tensor keeps;
    char* memory;
    std::string bytes;
  };
  std::vector<std::function<void()>> launches;
  std::map<char*, Saved> before;
  std::vector<at::Tensor> made;

  void save(const at::Tensor& written) {
    auto* memory = static_cast<char*>(written.storage().mutable_data());
    if (memory && !before.count(memory))
      before[memory] = {written, memory, std::string(memory, written.storage().nbytes())};
  }
  void end() {
    for (auto& tensor : made) std::memset(tensor.data_ptr(), 0xFF, tensor.nbytes());
    for (auto& [_, saved] : before) std::memcpy(saved.memory, saved.bytes.data(), saved.bytes.size());
    before.clear(), made.clear();
  }
  void replay() const {
    note(::launches, "replay");
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& launch : launches) launch();
  }
};
std::shared_ptr<Recording> recording;

void each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& look);

void record_launch(
    const c10::OperatorHandle& op, const std::vector<c10::IValue>& given, std::vector<c10::IValue> host,
    const std::vector<c10::IValue>& results) {
  std::set<void*> inputs;
  for (size_t i = 0; i < host.size(); i++) {
    // a number on the host is taken as it is now
    if (given[i].isTensor() && given[i].toTensor().defined() && given[i].toTensor().is_cpu())
      host[i] = given[i].toTensor().clone();
    each_tensor(given[i], [&](const at::Tensor& tensor) { inputs.insert(tensor.storage().mutable_data()); });
  }
  std::vector<at::Tensor> kept;
  for (const auto& result : results)
    each_tensor(result, [&](const at::Tensor& tensor) {
      kept.push_back(tensor);
      if (tensor.numel() && !inputs.count(tensor.storage().mutable_data())) recording->made.push_back(tensor);
    });
  recording->launches.push_back([op, host, kept] {
    torch::jit::Stack stack(host);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    size_t place = 0;
    for (const auto& result : stack)
      each_tensor(result, [&](const at::Tensor& found) {
        const auto& into = kept[place++];
        if (found.numel() && found.data_ptr() != into.data_ptr()) into.copy_(found);
      });
  });
}

c10::IValue map_tensors(const c10::IValue& value, at::Tensor (*change)(const at::Tensor&)) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor.has_value() ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return changed;
  }
  return value;
}

void each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& look) {
  if (value.isTensor() && value.toTensor().defined()) look(value.toTensor());
  if (value.isTensorList())
    for (const at::Tensor& tensor : value.toTensorVector())
      if (tensor.defined()) look(tensor);
  if (value.isOptionalTensorList())
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      if (tensor.has_value() && tensor->defined()) look(*tensor);
}

// Operators whose result or whose checks the host must know, on CUDA.
const std::set<std::string> kWaiting = {
    "aten::nonzero",    "aten::bincount",          "aten::_unique",  "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::masked_select", "aten::equal", "aten::histc",    "aten::multinomial"};
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};

// What CUDA allows of tensors on the host beside some on the device: numbers (0-d) that are only read, and indices.
// CUDA copies and widens uint16 to uint64, and has hardly an operator besides.
void check_types(const std::string& name, const std::vector<c10::IValue>& given) {
  for (const auto& value : given)
    each_tensor(value, [&](const at::Tensor& tensor) {
      const auto type = tensor.scalar_type();
      TORCH_CHECK(
          type != at::kUInt16 && type != at::kUInt32 && type != at::kUInt64, name, ": not implemented for ", type);
    });
}

void check_devices(const std::string& name, const c10::FunctionSchema& schema, const std::vector<c10::IValue>& given) {
  bool has_device = false, has_mask = false;
  for (const auto& value : given)
    each_tensor(value, [&](const at::Tensor& tensor) { has_device |= tensor.device().type() == kPretend; });
  if (!has_device) return;
  const bool indexes = kIndexing.count(name);
  for (size_t i = 0; i < given.size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool is_written = alias && alias->isWrite();
    each_tensor(given[i], [&](const at::Tensor& tensor) {
      has_mask |= i > 0 && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte);
      if (tensor.device().type() == kPretend) return;
      if (indexes && i == 1) return note(copies, "pageable index", tensor.nbytes());
      if (tensor.dim() == 0 && !is_written) return;
      note(mixed, name);
      TORCH_CHECK(false, name, ": expected all tensors to be on the same device, found pretend:0 and cpu");
    });
  }
  // `index` itself turns a mask into indices first, by nonzero.
  if (kWaiting.count(name) || (indexes && name != "aten::index" && has_mask)) wait_for_device(name);
  for (size_t i = 0; i < given.size(); i++) {
    const auto& argument = schema.arguments()[i].name();
    if (name == "aten::repeat_interleave" && argument == "output_size" && given[i].isNone()) wait_for_device(name);
    if (name == "aten::segment_reduce" && argument == "unsafe" && !given[i].toBool()) wait_for_device(name);
  }
}

// On tensors without elements CUDA launches nothing.
bool is_for_nothing(const std::vector<c10::IValue>& given) {
  bool has_tensors = false, has_elements = false;
  for (const auto& value : given)
    each_tensor(value, [&](const at::Tensor& tensor) { has_tensors = true, has_elements |= tensor.numel() > 0; });
  return has_tensors && !has_elements;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.operator_name().name;
  const size_t count = schema.arguments().size();
  std::vector<c10::IValue> given(stack->end() - count, stack->end());
  check_devices(name, schema, given);
  check_types(name, given);
  if (!is_for_nothing(given)) note(launches, name);
  torch::jit::drop(*stack, count);
  std::vector<std::pair<at::Tensor, at::Tensor>> to_resize;
  for (size_t i = 0; i < count; i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite() && given[i].isTensor() && given[i].toTensor().numel() == 0) {
      // An `out` that the operator shall give its size: borrowed memory cannot grow.
      to_resize.emplace_back(given[i].toTensor(), at::empty(given[i].toTensor().sizes(), given[i].toTensor().options().device(at::kCPU)));
      stack->push_back(to_resize.back().second);
    } else {
      stack->push_back(given[i].isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : map_tensors(given[i], &on_host));
    }
  }
  const std::vector<c10::IValue> host(stack->end() - count, stack->end());
  for (size_t i = 0; recording && i < count; i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite())
      each_tensor(given[i], [](const at::Tensor& tensor) { recording->save(tensor); });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (recording) record_launch(op, given, host, {stack->end() - schema.returns().size(), stack->end()});
  for (auto& [kept, grown] : to_resize)
    if (grown.numel() > 0) {
      auto memory = on_device(grown);
      kept.unsafeGetTensorImpl()->set_storage_keep_dtype(memory.storage());
      kept.unsafeGetTensorImpl()->set_sizes_and_strides(grown.sizes(), grown.strides());
    }
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; i++) {
    auto& result = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (!alias) {
      result = map_tensors(result, &on_device);
      continue;
    }
    for (size_t j = 0; j < count; j++) {
      const auto* of_argument = schema.arguments()[j].alias_info();
      if (of_argument && of_argument->beforeSets() == alias->beforeSets()) result = given[j];
    }
  }
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool up = from.device().is_cpu(), down = to.device().is_cpu();
  const auto host = up ? from : to;
  const bool has_pinned = (up || down) && is_pinned(host.data_ptr());
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(!recording || (!up && !down), "pretend device: a copy from or to the host while a step is recorded");
  if (!up && !down) {
    note(launches, "aten::copy_");
    if (recording) {
      recording->save(to);
      recording->launches.push_back([from, to] { on_host(to).copy_(on_host(from)); });
    }
  } else if (from.numel() > 0) {
    note(copies, has_pinned ? "pinned" : "pageable", from.nbytes());
    note(copies, std::string(up ? "to" : "from") + " the device");
    if (!non_blocking || (down && !has_pinned)) wait_for_device(up ? "copy to the device" : "copy to the host");
    if (up && non_blocking && has_pinned && current_stream != 0) {
      Held lock(queues_mutex);
      queues[current_stream].copies.emplace_back(on_host(to), from);
      return to;
    }
  }
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& self) {
  wait_for_device("item");
  return on_host(self).item();
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  if (self.storage().nbytes() < bytes) {
    auto storage = self.storage();
    auto fresh = device_memory.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  return self;
}

// A sparse matrix in CSR times a dense one, the one operation on sparse tensors that is offered.
at::Tensor multiply_csr(const at::Tensor& sparse, const at::Tensor& dense) {
  note(launches, "aten::mm (CSR)");
  TORCH_CHECK(dense.device().type() == kPretend, "mm: expected all tensors to be on the same device");
  auto* csr = static_cast<at::SparseCsrTensorImpl*>(sparse.unsafeGetTensorImpl());
  const auto host = at::_sparse_csr_tensor_unsafe(
      on_host(csr->compressed_indices()), on_host(csr->plain_indices()), on_host(csr->values()), sparse.sizes());
  const auto table = on_host(dense), product = at::mm(host, table);
  if (recording) {
    recording->made.push_back(product);
    recording->launches.push_back([host, table, product] { product.copy_(at::mm(host, table)); });
  }
  return on_device(product);
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, SparseCsrPrivateUse1, m) { m.impl("mm", multiply_csr); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("record_stream", record_stream);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  // One launch for all tensors, as on CUDA; without this each would be one.
  for (const char* name : {
           "_foreach_norm.Scalar", "_foreach_add_.List", "_foreach_add_.Scalar", "_foreach_sub_.List",
           "_foreach_mul_.Tensor"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("noted", [] {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::map<std::string, Tally>{{"launches", launches}, {"waits", waits}, {"mixed", mixed}, {"copies", copies}};
  });
  m.def("forget", [] {
    std::lock_guard<std::mutex> lock(mutex_);
    launches.clear(), waits.clear(), mixed.clear(), copies.clear();
  });
  py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
      .def("replay", &Recording::replay)
      .def_property_readonly("num_launches", [](const Recording& own) { return own.launches.size(); });
  m.def("begin_recording", [] { recording = std::make_shared<Recording>(), is_recording = true; });
  m.def("end_recording", [] {
    is_recording = false, recording->end();
    return std::exchange(recording, nullptr);
  });
  m.def("refuse_waits", [](bool refuses) { refuses_waits = refuses; });
}
