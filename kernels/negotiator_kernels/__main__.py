from negotiator_kernels.availability import backends

for backend in backends():
    print(f"{backend.name:8}{'on' if backend.on else 'off':5}{backend.detail}")
